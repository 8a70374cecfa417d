"""In the place of `spconv.pytorch.ops`, which networks import without using it: its functions do not exist here."""


def __getattr__(name):
    raise AttributeError(f"unipad.spconv has no `ops.{name}`: only the layers of spconv exist here")
