"""Statistics of velocities and of drawn pictures, with their intervals: numbers in, numbers out."""
