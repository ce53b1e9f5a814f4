"""Find the faces in a photo, align them as face restorers expect, restore them, and blend them back in.

Points are (x, y) in pixels; the center of the first pixel is (0, 0).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from milo_latent.checks import check_batch, check_finite, check_range

FACE_SIZE = 512
# mean position of the landmarks (in the order of `Face.landmarks`) in FFHQ's faces at 512 pixels, on which DiffBIR's
# face models were trained
TEMPLATE = ((192.98, 239.95), (318.90, 240.19), (256.63, 314.02), (201.26, 371.41), (313.09, 371.15))
MASK_BORDER, MASK_RAMP = 0.04, 0.12  # fractions of the side: a border of weight 0, then the rise to weight 1
SMALLEST_EYE_DISTANCE = 5.0  # pixels; faces below it are too small to restore, or in profile
DETECTION_SIDE = 640  # pixels of the short side; detectors find the faces of ordinary photos well at this size
SAME_FACE = 0.4  # intersection over union from which two boxes are taken for one face


@dataclass(frozen=True)
class Face:
    """A detected face.

    Args:
        box: left, top, width, height.
        landmarks: (5, 2): left eye, right eye, tip of the nose, left and right corner of the mouth, as they lie in the
            photo.
        score: confidence of the detector, in [0, 1].
    """

    box: tuple[float, float, float, float]
    landmarks: Tensor
    score: float = 1.0

    def scaled(self, factor: float) -> Face:
        """Return the face in the photo enlarged by `factor`."""
        left, top, width, height = (value * factor for value in self.box)
        return Face((left, top, width, height), (self.landmarks + 0.5) * factor - 0.5, self.score)


Detector = Callable[[Tensor], Sequence[Face]]
Restore = Callable[[Tensor], Tensor]  # (1, 3, H, W) in [0, 1] to the restored image


def similarity_transform(source: Tensor, target: Tensor) -> Tensor:
    """Find the rotation, scale and shift that map points, (N, 2), to others with the least squared error.

    Returns:
        Matrix, (2, 3) float64: `matrix[:, :2] @ point + matrix[:, 2]`.

    Raises:
        ValueError: if the shapes differ, or all points of `source` coincide.
    """
    if source.shape != target.shape or source.ndim != 2 or source.shape[1] != 2:
        raise ValueError(f"Expected points (N, 2) twice, got {tuple(source.shape)} and {tuple(target.shape)}.")
    # with points as complex numbers, the map is z -> factor * z + shift: linear least squares, and never a mirror image
    source_points, target_points = (torch.view_as_complex(each.double().contiguous()) for each in (source, target))
    centered = source_points - source_points.mean()
    energy = centered.abs().square().sum()
    if not energy > 1e-12 * len(source):
        raise ValueError("Expected landmarks that differ, got one point several times.")
    factor = (centered.conj() * target_points).sum() / energy
    shift = target_points.mean() - factor * source_points.mean()
    rows = [[factor.real, -factor.imag, shift.real], [factor.imag, factor.real, shift.imag]]
    return torch.stack([torch.stack(row) for row in rows])  # (2, 3)


def inverse_transform(matrix: Tensor) -> Tensor:
    """Return the inverse of an affine map, (2, 3)."""
    linear = torch.linalg.inv(matrix[:, :2])
    return torch.cat([linear, -linear @ matrix[:, 2:]], dim=1)


def warp(
    image: Tensor, to_source: Tensor, size: tuple[int, int], *, padding: Literal["zeros", "border", "reflection"]
) -> Tensor:
    """Resample an image, (1, C, H, W), along an affine map: bicubic, and averaged where the image shrinks.

    Args:
        image: continues outside its border as `padding` says.
        to_source: (2, 3), from points of the result to points of `image`.
        size: height and width of the result, (1, C, *size); bicubic overshoot may leave the range of `image`.
        padding: as of `torch.nn.functional.grid_sample`.
    """
    zoom = float(torch.linalg.det(to_source[:, :2]).abs().sqrt())  # pixels of `image` in one of the result
    samples = max(1, round(zoom))
    across, down = (
        (torch.arange(side * samples, dtype=torch.float64, device=to_source.device) + 0.5) / samples - 0.5
        for side in (size[1], size[0])
    )
    points = torch.stack(torch.meshgrid(across, down, indexing="xy"), dim=-1)  # (height, width, 2)
    points = points @ to_source[:, :2].T + to_source[:, 2]
    extent = torch.tensor([image.shape[3], image.shape[2]], dtype=torch.float64, device=to_source.device)
    grid = ((2 * points + 1) / extent - 1)[None].to(image)
    sampled = F.grid_sample(image, grid, mode="bicubic", padding_mode=padding, align_corners=False)
    return F.avg_pool2d(sampled, samples) if samples > 1 else sampled


def align_face(image: Tensor, landmarks: Tensor) -> tuple[Tensor, Tensor]:
    """Crop a face, rotated and scaled so that its landmarks, (5, 2), lie where they do in FFHQ.

    Returns:
        The face, (1, 3, 512, 512), and the matrix from points of the image to points of the face, (2, 3).
    """
    matrix = face_transform(landmarks.to(image.device))
    face = warp(image, inverse_transform(matrix), (FACE_SIZE, FACE_SIZE), padding="reflection")
    return face.clamp(0, 1), matrix


def face_transform(landmarks: Tensor) -> Tensor:
    """Return the (2, 3) matrix from points of a photo to points of the aligned face, given its landmarks, (5, 2)."""
    return similarity_transform(landmarks, torch.tensor(TEMPLATE, dtype=torch.float64, device=landmarks.device))


def soft_mask(size: int) -> Tensor:
    """Return the weight of the restored face, (1, 1, size, size): 1 inside, falling smoothly to 0 at the border."""
    place = (torch.arange(size) + 0.5) / size
    border = torch.minimum(place, 1 - place)
    rise = ((border - MASK_BORDER) / MASK_RAMP).clamp(0, 1)
    profile = torch.sin(rise * math.pi / 2).square()
    return (profile[:, None] * profile)[None, None]


def paste_face(image: Tensor, face: Tensor, matrix: Tensor) -> Tensor:
    """Blend an aligned face into its photo; only the pixels around it are computed.

    Args:
        image: (1, 3, H, W), in [0, 1].
        face: (1, 3, size, size), in [0, 1].
        matrix: from points of `image` to points of `face`, (2, 3), as returned by `align_face`.

    Returns:
        Image with the face, (1, 3, H, W); pixels of `image` are unchanged where `soft_mask` is 0.
    """
    size = face.shape[-1]
    back = inverse_transform(matrix.to(image.device))
    end = size - 0.5
    corners = back.new_tensor([[-0.5, -0.5], [end, -0.5], [-0.5, end], [end, end]]) @ back[:, :2].T + back[:, 2]
    sides = back.new_tensor([image.shape[3], image.shape[2]])
    left, top = corners.amin(0).floor().clamp(min=0).long().tolist()
    right, bottom = corners.amax(0).ceil().add(1).minimum(sides).long().tolist()
    if right <= left or bottom <= top:
        return image
    to_face = matrix.to(image.device).clone()
    to_face[:, 2] += to_face[:, :2] @ to_face.new_tensor([left, top])
    window = (bottom - top, right - left)
    patch = warp(face.to(image), to_face, window, padding="border").clamp(0, 1)
    weight = warp(soft_mask(size).to(image), to_face, window, padding="zeros").clamp(0, 1)
    result = image.clone()
    result[..., top:bottom, left:right] = image[..., top:bottom, left:right].lerp(patch, weight)
    return result


def find_faces(image: Tensor, detector: Detector) -> list[Face]:
    """Find faces, large and small: at a short side of 640 pixels, and in larger photos also at full size.

    Args:
        image: (1, 3, H, W), in [0, 1].
        detector: returns the faces of such an image.

    Returns:
        Faces in points of `image`, each once, the smallest first; faces in profile and tiny ones are left out.
    """
    ideal = DETECTION_SIDE / min(image.shape[2:])
    found: list[Face] = []
    for factor in {ideal, 1.0} if ideal < 1 else {ideal}:
        size = [max(1, round(side * factor)) for side in image.shape[2:]]
        resized = F.interpolate(image, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        found += [face.scaled(1 / factor) for face in detector(resized if factor != 1.0 else image)]
    kept: list[Face] = []
    for face in sorted(found, key=lambda each: -each.score):
        eyes = float(torch.linalg.vector_norm(face.landmarks[0].double() - face.landmarks[1].double()))
        if eyes * max(ideal, 1.0) >= SMALLEST_EYE_DISTANCE and all(_overlap(face, one) < SAME_FACE for one in kept):
            kept.append(face)
    return sorted(kept, key=lambda each: each.box[2] * each.box[3])


def _overlap(one: Face, other: Face) -> float:
    """Return the boxes' intersection over their union."""
    sides = [
        max(0.0, min(one.box[axis] + one.box[axis + 2], other.box[axis] + other.box[axis + 2]) - max(starts))
        for axis, starts in enumerate(zip(one.box[:2], other.box[:2], strict=True))
    ]
    shared = sides[0] * sides[1]
    return shared / max(one.box[2] * one.box[3] + other.box[2] * other.box[3] - shared, 1e-9)


def restore_faces(
    image: Tensor,
    *,
    detector: Detector,
    restore_face: Restore,
    restore_background: Restore | None = None,
    upscale: float = 1.0,
) -> Tensor:
    """Restore a photo, and the faces in it by a function of their own.

    Args:
        image: degraded photo, (1, 3, H, W), in [0, 1].
        detector: returns the faces of an image, as `milo_latent.restoration.face_detector.YuNet` does.
        restore_face: from an aligned face, (1, 3, 512, 512), to the restored one, of the same shape.
        restore_background: from `image` to the restored photo, `upscale` times as large; None only enlarges the image.
        upscale: how much larger the result is.

    Returns:
        Restored photo, (1, 3, H * upscale, W * upscale), in [0, 1].

    Raises:
        TypeError: if `image` is not floating point.
        ValueError: for several images, NaN, no face, or a result of another size than expected.
    """
    check_batch("image", image, 3)
    check_finite("image", image)
    check_range("upscale", upscale, 1 / 64, 64)
    if image.shape[0] != 1:
        raise ValueError(f"Expected one photo, (1, 3, H, W), got {tuple(image.shape)}. Restore them one by one.")
    faces = find_faces(image, detector)
    if not faces:
        raise ValueError(
            f"Expected a face, found none in {image.shape[3]}x{image.shape[2]} pixels. Restore the photo with task "
            '"sr" or "denoise", or lower the detector\'s `score_threshold`.'
        )
    size = tuple(round(side * upscale) for side in image.shape[2:])
    if restore_background is None:
        photo = F.interpolate(image, size=size, mode="bicubic", antialias=True).clamp(0, 1)
    else:
        photo = _checked(restore_background(image), size, "restore_background")
    for face in faces:
        aligned, _ = align_face(image, face.landmarks)
        restored = _checked(restore_face(aligned), (FACE_SIZE, FACE_SIZE), "restore_face")
        photo = paste_face(photo, restored.to(photo), face_transform(face.scaled(upscale).landmarks.to(photo.device)))
    return photo


def _checked(image: Tensor, size: tuple[int, ...], name: str) -> Tensor:
    if tuple(image.shape) != (1, 3, *size):
        raise ValueError(f"Expected `{name}` to return {(1, 3, *size)}, got {tuple(image.shape)}.")
    return image
