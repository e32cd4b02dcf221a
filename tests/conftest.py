"""For all tests: hypothesis judges what is seen, never how long it took."""

from hypothesis import settings

settings.register_profile("house", deadline=None)
settings.load_profile("house")
