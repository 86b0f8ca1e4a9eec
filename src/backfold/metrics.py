"""Measures of restored images, of energies and of embeddings, all of them pure functions.

Doubles are used on the CPU alone: not every device has them.
"""

import torch
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from backfold.errors import UserError

MAX_PSNR_DB = 100.0
SSIM_SIGMA = 1.5
SSIM_RADIUS = 5
KNN_TEMPERATURE = 0.07
NEIGHBOURS = 10  # that `knn_distance` is the mean of


def psnr_db(restored: Tensor, clean: Tensor, std: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in decibels, ``(batch,)``; identical images get 100.

    Images are (batch, channels, height, width), normalised, and not clipped; ``std``, (channels,),
    is the deviation by which pixels in [0, 1] were divided. The peak is 1.
    """
    restored, clean = (images.float() * _per_channel(std, clean) for images in (restored, clean))
    ratio = peak_signal_noise_ratio(
        restored, clean, data_range=1.0, reduction="none", dim=(1, 2, 3)
    )
    return ratio.clamp(max=MAX_PSNR_DB)


def ssim(restored: Tensor, clean: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Structural similarity of each image, ``(batch,)``, at most 1; arguments as for `psnr_db`.

    Gaussian windows of deviation 1.5 and 11 pixels across, of which only those wholly inside the
    image count. In images of fewer than 11 pixels, 3 or more, the window shrinks to the largest
    that fits.
    """
    radius = min(SSIM_RADIUS, (min(clean.shape[-2:]) - 1) // 2)
    if radius < 1:
        raise UserError(f"ssim can't compare {tuple(clean.shape[-2:])} pixels; give 3 x 3 or more")
    scale, offset = _per_channel(std, clean), _per_channel(mean, clean)
    _, similarity_map = structural_similarity_index_measure(
        restored.float() * scale + offset,
        clean.float() * scale + offset,
        sigma=SSIM_SIGMA if radius == SSIM_RADIUS else radius / 3.5,  # torchmetrics: 3.5 sigmas
        reduction="none",
        data_range=1.0,
        return_full_image=True,
    )
    # Whether windows that hang over the border count differs between torchmetrics' versions.
    similarity: Tensor = similarity_map[..., radius:-radius, radius:-radius].mean(dim=(1, 2, 3))
    return similarity


def _per_channel(values: Tensor, images: Tensor) -> Tensor:
    return values.to(images.device, torch.float32).view(-1, 1, 1)


def rank_me(embeddings: Tensor) -> float:
    """Effective rank of embeddings ``(images, features)``, from 1 to the number of features.

    The exponential of the entropy of the normalised singular values (RankMe, Garrido et al., ICML
    2023), without centring; 0 where all embeddings are zero.
    """
    singular_values = torch.linalg.svdvals(embeddings.cpu().double())
    total = singular_values.sum()
    if total == 0:
        return 0.0
    return float(torch.special.entr(singular_values / total).sum().exp())


def energy_auroc(clean_energies: Tensor, corrupted_energies: Tensor) -> float:
    """How often, from 0 to 1, a clean image's energy is below a corrupted one's; ties count half.

    All pairs are compared. Energies are finite, (clean images,) and (corrupted images,).
    """
    energies = torch.cat([clean_energies, corrupted_energies]).cpu().double()
    is_corrupted = torch.arange(len(energies)) >= len(clean_energies)
    return float(roc_auc_score(is_corrupted.numpy(), energies.numpy()))


def energy_gap(clean_energies: Tensor, corrupted_energies: Tensor) -> float:
    """Mean energy of the corrupted images minus that of the clean ones."""
    return float(corrupted_energies.cpu().double().mean() - clean_energies.cpu().double().mean())


def knn_accuracy(
    train_embeddings: Tensor,
    train_labels: Tensor,
    test_embeddings: Tensor,
    test_labels: Tensor,
    k: int = 20,
) -> float:
    """Accuracy, from 0 to 1, of the k nearest training images' weighted vote; of fewer, all vote.

    Neighbours are nearest in cosine similarity and vote with weight exp(similarity / 0.07), the
    usual protocol of self-supervised learning (Wu et al., CVPR 2018). Embeddings are (images,
    features), labels (images,) whole numbers.
    """
    bank, queries = (F.normalize(each.float()) for each in (train_embeddings, test_embeddings))
    classes, votes_for = torch.unique(train_labels, return_inverse=True)
    nearest, indices = (queries @ bank.T).topk(min(k, len(bank)), dim=1)
    votes = nearest.new_zeros(len(queries), len(classes))
    votes.scatter_add_(1, votes_for[indices], (nearest / KNN_TEMPERATURE).exp())
    return float((classes[votes.argmax(dim=1)] == test_labels).float().mean())


def knn_distance(bank: Tensor, queries: Tensor) -> Tensor:
    """Mean distance, 0 to 2, of each query to its 10 nearest neighbours, at unit length."""
    search = NearestNeighbors(n_neighbors=min(NEIGHBOURS, len(bank)), algorithm="brute")
    search.fit(F.normalize(bank.float()).numpy())
    distances, _ = search.kneighbors(F.normalize(queries.float()).numpy())
    return torch.from_numpy(distances.mean(axis=1))
