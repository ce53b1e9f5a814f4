"""Faces: aligned to a template by their landmarks, put back where they were without a seam, found by any detector."""

import math
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from milo_latent.restoration.face_detector import YuNet
from milo_latent.restoration.faces import (
    FACE_SIZE,
    TEMPLATE,
    Face,
    align_face,
    face_transform,
    find_faces,
    inverse_transform,
    paste_face,
    restore_faces,
    similarity_transform,
    soft_mask,
)

POINTS = torch.tensor(TEMPLATE, dtype=torch.float64)


def picture(height=300, width=400):
    """Smooth shading in three colours, with a bright disc."""
    down, across = torch.meshgrid(torch.arange(height) / height, torch.arange(width) / width, indexing="ij")
    disc = torch.sigmoid((0.2 - ((down - 0.5) ** 2 + (across - 0.5) ** 2).sqrt()) * 30)
    return torch.stack([0.2 + 0.5 * across, 0.3 + 0.3 * disc, 0.8 - 0.5 * down])[None]


def face_at(x, y, *, width=100.0, angle=0.0, score=1.0):
    """A face whose aligned square has this centre and side."""
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)
    points = (POINTS - 255.5) * (width / FACE_SIZE) @ turn.T + torch.tensor([x, y], dtype=torch.float64)
    return Face((x - width / 2, y - width / 2, width, width), points, score)


@pytest.mark.parametrize(("angle", "scale"), [(0.0, 1.0), (0.7, 0.3), (-2.5, 4.0)])
def test_a_known_similarity_is_found(angle, scale):
    linear = scale * torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]).double()
    expected = torch.cat([linear, torch.tensor([[30.0], [-7.0]]).double()], dim=1)
    target = POINTS @ expected[:, :2].T + expected[:, 2]
    assert torch.allclose(similarity_transform(POINTS, target), expected, atol=1e-9)


def test_noisy_landmarks_are_met_as_well_as_any_similarity_can():
    generator = torch.Generator().manual_seed(0)
    target = POINTS * 0.4 + 3 * torch.randn(5, 2, generator=generator).double()
    matrix = similarity_transform(POINTS, target)

    def error(values):
        return (POINTS @ values[:, :2].T + values[:, 2] - target).square().sum()

    assert torch.allclose(matrix[0, 0], matrix[1, 1])
    assert torch.allclose(matrix[0, 1], -matrix[1, 0])
    for row, column in ((0, 2), (1, 2)):
        for step in (-0.01, 0.01):
            moved = matrix.clone()
            moved[row, column] += step
            assert error(moved) > error(matrix)
    for factor in (0.999, 1.001):
        assert error(torch.cat([matrix[:, :2] * factor, matrix[:, 2:]], 1)) > error(matrix)


def test_mirrored_landmarks_are_not_mirrored_back():
    mirrored = POINTS * torch.tensor([-1.0, 1.0]).double()
    assert torch.linalg.det(similarity_transform(POINTS, mirrored)[:, :2]) > 0


def test_landmarks_in_one_point_are_refused():
    with pytest.raises(ValueError, match="landmarks that differ"):
        similarity_transform(torch.ones(5, 2), POINTS)
    with pytest.raises(ValueError, match=r"points \(N, 2\) twice"):
        similarity_transform(POINTS[:3], POINTS)


def test_the_inverse_undoes_the_transform():
    matrix = face_transform(face_at(200, 150, angle=0.4).landmarks)
    points = POINTS @ matrix[:, :2].T + matrix[:, 2]
    back = inverse_transform(matrix)
    assert torch.allclose(points @ back[:, :2].T + back[:, 2], POINTS)


def test_a_face_that_lies_as_the_template_is_cut_out_as_it_is():
    image = torch.rand(1, 3, 600, 600, generator=torch.Generator().manual_seed(0))
    aligned, matrix = align_face(image, POINTS + 40)
    assert torch.allclose(matrix, torch.tensor([[1.0, 0.0, -40.0], [0.0, 1.0, -40.0]]).double(), atol=1e-9)
    assert torch.allclose(aligned, image[..., 40:552, 40:552], atol=1e-4)


def test_aligning_puts_the_landmarks_on_the_template():
    face = face_at(200, 150, width=120, angle=0.5)
    image = torch.zeros(1, 3, 300, 400)
    down, across = torch.meshgrid(torch.arange(300), torch.arange(400), indexing="ij")
    for x, y in face.landmarks.tolist():
        image += torch.exp(-((across - x) ** 2 + (down - y) ** 2) / 8)
    aligned, _ = align_face(image.clamp(0, 1), face.landmarks)
    for x, y in TEMPLATE:
        window = aligned[0, 0, round(y) - 12 : round(y) + 13, round(x) - 12 : round(x) + 13]
        rows, columns = torch.meshgrid(torch.arange(25.0), torch.arange(25.0), indexing="ij")
        centre = [float((window * place).sum() / window.sum()) for place in (columns, rows)]
        assert centre == pytest.approx([x - round(x) + 12, y - round(y) + 12], abs=0.3)


@pytest.mark.parametrize(
    ("face", "tolerance"),
    [
        (face_at(200, 150, width=180, angle=0.0), 0.003),
        (face_at(200, 150, width=180, angle=0.6), 0.003),
        (face_at(60, 40, width=180, angle=-0.3), 0.003),  # beyond the photo's corner
        (face_at(700, 500, width=900, angle=0.2), 0.01),  # larger than the aligned face
    ],
)
def test_an_unchanged_face_put_back_leaves_the_photo_as_it_was(face, tolerance):
    image = picture() if face.box[2] < 512 else picture(1000, 1400)
    aligned, matrix = align_face(image, face.landmarks)
    assert (paste_face(image, aligned, matrix) - image).abs().max() < tolerance


@pytest.mark.parametrize("angle", [0.0, 0.5])
def test_a_changed_face_has_no_seam(angle):
    image, face = torch.full((1, 3, 300, 400), 0.4), face_at(200, 150, width=200, angle=angle)
    aligned, matrix = align_face(image, face.landmarks)
    change = paste_face(image, aligned + 0.4, matrix) - image
    assert change.max() == pytest.approx(0.4, abs=1e-3)
    steepest = 0.4 * math.pi / 2 / (0.12 * 200)  # a cosine's rise over 12 % of the side
    for axis in (2, 3):
        assert change.diff(dim=axis).abs().max() < 1.1 * steepest
    down, across = torch.meshgrid(torch.arange(300) - 150, torch.arange(400) - 200, indexing="ij")
    outside = torch.maximum(down.abs(), across.abs()) > 200 * 0.75
    assert (change[0, 0][outside] == 0).all()


def test_the_mask_is_full_on_the_face_and_nothing_at_the_border():
    mask = soft_mask(FACE_SIZE)[0, 0]
    for x, y in TEMPLATE:
        assert mask[round(y), round(x)] == 1
    for edge in (mask[0], mask[-1], mask[:, 0], mask[:, -1]):
        assert (edge == 0).all()


def test_a_face_outside_the_photo_changes_nothing():
    image = picture()
    matrix = face_transform(face_at(2000, 2000).landmarks)
    assert torch.equal(paste_face(image, torch.ones(1, 3, FACE_SIZE, FACE_SIZE), matrix), image)


def test_faces_are_restored_at_512_and_put_into_the_enlarged_background():
    image, seen = picture(), []
    faces = [face_at(120, 150, width=110), face_at(290, 150, width=110, angle=0.2)]

    def detect(photo):
        return [face.scaled(photo.shape[2] / 300) for face in faces]

    def restore_face(face):
        seen.append(face.shape)
        return torch.ones_like(face)

    def restore_background(photo):
        return F.interpolate(photo, scale_factor=2.0, mode="nearest") * 0.5

    result = restore_faces(
        image, detector=detect, restore_face=restore_face, restore_background=restore_background, upscale=2.0
    )
    assert result.shape == (1, 3, 600, 800)
    assert seen == [(1, 3, FACE_SIZE, FACE_SIZE)] * 2
    for x in (240, 580):
        assert torch.allclose(result[..., 300, x], torch.ones(1, 3), atol=1e-4)
    assert torch.equal(result[..., :100], restore_background(image)[..., :100])


def test_without_a_background_restorer_the_photo_is_only_enlarged():
    image = picture()
    result = restore_faces(
        image, detector=lambda photo: [face_at(320, 320, width=200)], restore_face=lambda face: face, upscale=1.0
    )
    assert (result - image).abs().max() < 0.003


def test_no_face_is_an_error_that_names_the_way_out():
    with pytest.raises(ValueError, match="found none in 400x300 pixels") as error:
        restore_faces(picture(), detector=lambda photo: [], restore_face=lambda face: face)
    assert "score_threshold" in str(error.value)


def test_restorers_that_change_the_size_and_batches_are_refused():
    detect = [face_at(320, 320, width=200)]
    with pytest.raises(ValueError, match=r"`restore_face` to return \(1, 3, 512, 512\), got \(1, 3, 256, 256\)"):
        restore_faces(picture(), detector=lambda photo: detect, restore_face=lambda face: face[..., ::2, ::2])
    with pytest.raises(ValueError, match=r"`restore_background` to return \(1, 3, 600, 800\)"):
        restore_faces(
            picture(),
            detector=lambda photo: detect,
            restore_face=lambda face: face,
            restore_background=lambda photo: photo,
            upscale=2.0,
        )
    with pytest.raises(ValueError, match="one photo"):
        restore_faces(picture().repeat(2, 1, 1, 1), detector=lambda photo: detect, restore_face=lambda face: face)


def test_small_photos_are_enlarged_for_the_detector_and_faces_come_back_in_their_points():
    sizes, face = [], face_at(100, 80, width=60)

    def detect(photo):
        sizes.append(tuple(photo.shape[2:]))
        return [face.scaled(640 / 150)]

    (found,) = find_faces(picture(150, 200), detect)
    assert sizes == [(640, 853)]
    assert torch.allclose(found.landmarks, face.landmarks, atol=1e-6)
    assert found.box == pytest.approx(face.box)


def test_large_photos_are_searched_at_two_sizes_and_each_face_is_kept_once():
    sizes = set()
    small, large = face_at(300, 300, width=80, score=0.7), face_at(1200, 700, width=700, score=0.9)

    def detect(photo):
        sizes.add(tuple(photo.shape[2:]))
        factor = photo.shape[2] / 1280
        again = Face(large.box, large.landmarks, 0.5)
        return [face.scaled(factor) for face in ([large] if factor < 1 else [small, again])]

    found = find_faces(torch.zeros(1, 3, 1280, 1920), detect)
    assert sizes == {(640, 960), (1280, 1920)}
    assert [face.score for face in found] == [0.7, 0.9]  # small ones first


def test_tiny_faces_and_faces_in_profile_are_left_out():
    profile = face_at(320, 320, width=100)
    profile.landmarks[1] = profile.landmarks[0] + 1.0
    assert find_faces(torch.zeros(1, 3, 640, 640), lambda photo: [profile, face_at(50, 50, width=10)]) == []


@pytest.fixture
def opencv(monkeypatch):
    """A stand-in for OpenCV whose YuNet finds two faces."""

    class Network:
        def __init__(self, path, config, size, score_threshold):
            if b"onnx" not in Path(path).read_bytes():
                raise module.error("cannot read network\nmore")

        def setInputSize(self, size):  # noqa: N802 (OpenCV's name)
            module.size = size

        def detect(self, pixels):
            module.pixels = pixels
            row = np.array([10, 20, 50, 60, *range(20, 30), 0.8], dtype=np.float32)
            return 1, None if module.empty else np.stack([row, np.append(row[:14], 0.9).astype(np.float32)])

    module = ModuleType("cv2")
    module.error, module.empty = type("error", (Exception,), {}), False
    module.FaceDetectorYN = type("FaceDetectorYN", (), {"create": staticmethod(Network)})
    monkeypatch.setitem(sys.modules, "cv2", module)
    return module


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "yunet.onnx"
    path.write_bytes(b"onnx")
    return path


def test_yunet_is_given_8_bit_bgr_and_its_rows_are_read(opencv, model):
    image = picture(30, 40)
    found = YuNet(model)(image)
    assert opencv.size == (40, 30)
    assert opencv.pixels.shape == (30, 40, 3)
    assert opencv.pixels.dtype == np.uint8
    assert opencv.pixels[5, 7, 2] == round(float(image[0, 0, 5, 7]) * 255)
    assert [face.score for face in found] == pytest.approx([0.9, 0.8])
    assert found[0].box == (10.0, 20.0, 50.0, 60.0)
    assert found[0].landmarks.tolist() == [[20, 21], [22, 23], [24, 25], [26, 27], [28, 29]]


def test_yunet_finds_nothing_where_nothing_is(opencv, model):
    opencv.empty = True
    assert YuNet(model)(picture(30, 40)) == []


def test_files_that_are_no_detector_are_refused_with_the_address_of_one(opencv, tmp_path):
    with pytest.raises(FileNotFoundError, match="opencv_zoo"):
        YuNet(tmp_path / "none.onnx")
    wrong = tmp_path / "wrong.onnx"
    wrong.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"wrong\.onnx: cannot read network It is at .*opencv_zoo"):
        YuNet(wrong)


def test_missing_opencv_is_named_with_the_command_that_installs_it(monkeypatch, model):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match=r'pip install "milo_latent\[faces\]"'):
        YuNet(model)
