from __future__ import annotations


def placed(job, name, by_category):
    return {}
