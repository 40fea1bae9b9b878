"""Before a server serves: its flags, what is refused and how, what it reports."""
