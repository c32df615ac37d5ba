"""The one exception that every wing raises for a user's mistake."""


class UserError(ValueError):
  """A mistake of the user: what was given, what is allowed, what to do.

  The message is one line. The binaries print it and exit with code 2; a bug of
  ours is any other exception, and keeps its traceback.
  """
