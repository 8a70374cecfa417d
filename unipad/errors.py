"""The one exception that is a message to the user. Apart, so that processes which only draw need not load torch."""


class UserError(Exception):
    """Something the user can mend: the message is one sentence that names the flag or file and the mend."""
