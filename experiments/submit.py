"""A run on a cluster of Ray's launcher; its configuration is on the head node, or at a URI it can read.

    ray rsync-up cluster/gcp.yaml experiments/demo.yaml '~/demo.yaml'
    ray submit cluster/gcp.yaml experiments/submit.py '~/demo.yaml'

Versions, storage and GPUs of all nodes are looked at first. The same command goes on where a run stopped.
"""

import sys

from milp_ray.launch.driver import main

if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
