"""What samples are worth: networks that judge, statistics, metric cards."""
