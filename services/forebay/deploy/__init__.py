"""Places, starts, watches and ends the processes of a platform; the only importer of ray.

Only `serve_apps` imports ray, and only helper processes import `serve_apps`: the command line and
the supervisor stay small and quick to start.
"""
