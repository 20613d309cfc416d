"""What runs a container, for the types of ``runtimes.docker``. Read in this order:

spec        what an entry says, checked as far as that goes alone
mounts      what of this machine a container may see
plan        from an entry to what the engine is asked to make
engine      the Engine API: finding an engine, asking it, its failures
images      pulling, and the credentials for it (reference: the names of images)
container   a running one: its streams as a Pipe, its end with the true cause
life        all of it together: made, attached, started, removed again; and the sweep

Only ``spec`` and ``mounts`` are imported before the first container starts.
"""
