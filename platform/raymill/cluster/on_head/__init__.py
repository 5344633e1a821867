"""What runs on a cluster's head for the runs that are submitted to it.

Here: a request puts its code in place; the queue's actor acts on the line; an attempt trains; workers stand ready for the next.
Not here: what is decided, which is pure (`cluster/decisions`); what whoever submits sees (`cluster/submitted`).
"""
