"""One suite per kind: every member of the kind passes it."""
