"""The exceptions a user can meet. Their message says what was found, what was expected and what to do."""


class EquipoiseError(Exception):
    """Root of every error that is the user's to mend; the command line prints it without a traceback."""


class DataError(EquipoiseError):
    """A data file or record that cannot be used."""


class DiskFullError(EquipoiseError):
    """Something could not be written for want of space."""


class FirstRankError(EquipoiseError):
    """The first rank of a run could not do what the others waited for."""
