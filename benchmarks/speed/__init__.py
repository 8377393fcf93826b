"""`make bench`: how long things take here, beside what others take in the same run; see `__main__`."""
