"""The command rkv-sglang doctor: could a server here run with a policy?"""
