"""One attempt on Ray, on this machine or a cluster.

Here: the driver's process, the Ray it starts or joins, Ray Train, what a worker of it runs, why it failed, machines that leave.
Not here: what every executor has in common (`orchestration`), the training itself (`training`).
"""
