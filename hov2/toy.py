"""stub"""


def prepare(config):
    """stub"""
