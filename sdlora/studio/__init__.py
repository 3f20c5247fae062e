"""The live page: a small web server that lists, follows, starts and compares runs."""
