"""A model run beside itself with factors in it: does it do the same?"""
