"""Sites: the places where parameters meet data and per-sample gradients factorise. One file a site type; `base` holds the contract."""

from selection_ops.sites import embedding, experts, linear, norm
from selection_ops.sites.base import (
    Forward,
    MatrixParameter,
    Parameter,
    SiteType,
    SmallParameter,
    Tape,
    site_type,
    type_of,
)
from selection_ops.sites.find import ModelSites, Site, SiteReport, find_sites, search

__all__ = [
    "Forward",
    "MatrixParameter",
    "ModelSites",
    "Parameter",
    "Site",
    "SiteReport",
    "SiteType",
    "SmallParameter",
    "Tape",
    "embedding",
    "experts",
    "find_sites",
    "linear",
    "norm",
    "search",
    "site_type",
    "type_of",
]
