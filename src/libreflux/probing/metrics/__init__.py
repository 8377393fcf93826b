"""What is measured: statistics of velocities and of drawn pictures, with intervals."""
