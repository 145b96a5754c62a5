"""What everything may use: owners of handles, the worker thread, arguments, files that are written whole, and the
machine's limits.
"""
