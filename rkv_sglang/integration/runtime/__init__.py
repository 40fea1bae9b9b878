"""Inside a scheduler process with a policy."""
