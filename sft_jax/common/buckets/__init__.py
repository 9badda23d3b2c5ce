"""Buckets of gs:// and s3://: objects as files, and a workdir among them.

In: addresses. Out: verified copies on this machine's disk, of weights the bytes
that are read, objects written whole, and a folder that is kept equal to a
workdir in a bucket.

Reading order: `storage`, `ranges`, `remote_workdir`.
"""
