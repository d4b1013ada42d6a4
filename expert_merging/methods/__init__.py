"""The merging methods, one file a family of methods; importing this package registers them all."""

from expert_merging.methods import learned as learned
from expert_merging.methods import linear as linear
from expert_merging.methods import sparse as sparse
from expert_merging.methods import spectral as spectral
from expert_merging.methods import truncation as truncation
from expert_merging.methods import wudi as wudi
