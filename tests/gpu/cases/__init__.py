"""What runs in a process of its own: functions of JSON values that return JSON values; see `gpu.alone`."""
