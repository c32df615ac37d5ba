"""Reading and writing of third-party weight formats, without their code."""
