"""The platform's own gateway and worker code in one thread and in virtual time."""
