"""What speaks with Kubernetes, for ``runtimes.k8s_job`` and ``runtimes.k8s_service``. Read in this order:

access      finding a cluster and the right to use it
api         requests and watches (websocket: what attach and port-forward go through)

job_spec    what a k8s-job entry says
manifest    the Job that it becomes
look        what a pod's status says: why it waits, why it has ended
pod         that Job's pod as a Pipe: made, awaited, attached, watched, removed; and the sweep

endpoints   which pods stand behind a Service
routes      how requests get to them
scale       their workload, brought up by the first request and down by idleness

Only ``job_spec`` is imported before the first of them starts.
"""
