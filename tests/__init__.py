"""The tests: a folder for each folder of the package, and `harness` for what they share.

This file keeps the folder itself off `sys.path`, where pytest would put it: `deepspeed`, `kernels`
and others in it would be found in the place of packages of these names that are not installed.
The folders have no such file, so that a test and a job's script import their neighbours alike.
"""
