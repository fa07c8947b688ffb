"""``python -m milp_ray`` is ``milp-ray``."""

from milp_ray.cli import main

if __name__ == "__main__":
    main()
