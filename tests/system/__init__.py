"""Tests of the running system. A package, so that the fixture `system` ends with the last of them."""
