"""Compactions with everything about them checked.

For tests and for whoever doubts a server: they read and copy what each due request holds and wait for the device, many
times over. A server does so with ``RKV_SGLANG_VERIFY=1``.
"""
