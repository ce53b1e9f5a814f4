"""Find faces and their landmarks with OpenCV's YuNet; needs the extra `faces`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from milo_latent.checks import check_batch, check_file, check_range
from milo_latent.extras import import_extra
from milo_latent.pictures import to_8bit
from milo_latent.resources import sha256
from milo_latent.restoration.faces import Face

WEIGHTS = "https://github.com/opencv/opencv_zoo/tree/main/models/face_detection_yunet"


class YuNet:
    """Find faces with YuNet: 0.2 MB, MIT licence, milliseconds on a CPU.

    Args:
        path: its `.onnx` file, face_detection_yunet_2023mar.onnx of OpenCV's model zoo, which you download yourself.
        score_threshold: smallest confidence of a face, in [0, 1].

    Raises:
        ImportError: if OpenCV is not installed, with the command that installs it.
        FileNotFoundError: if there is no such file, with the address that has it.
        ValueError: if the file holds another model, or `score_threshold` is outside [0, 1].

    Source: Wu et al., "YuNet: A Tiny Millisecond-level Face Detector", Machine Intelligence Research 20, 2023.
    """

    def __init__(self, path: str | Path, *, score_threshold: float = 0.6) -> None:
        check_range("score_threshold", score_threshold, 0.0, 1.0)
        check_file(Path(path), "YuNet's .onnx file", f"It is at {WEIGHTS}.")
        self.settings = f"{sha256(Path(path))} {score_threshold}"
        cv2 = import_extra("cv2", "faces", "Finding faces")
        try:
            self._network = cv2.FaceDetectorYN.create(str(path), "", (320, 320), score_threshold=score_threshold)
        except cv2.error as error:
            first_line = str(error).strip().splitlines()[0]
            raise ValueError(f"Expected YuNet's .onnx file, got {path}: {first_line} It is at {WEIGHTS}.") from error

    def __repr__(self) -> str:
        """Return what the results depend on, the same for the same file wherever it lies."""
        return f"YuNet({self.settings})"

    def __call__(self, image: Tensor) -> list[Face]:
        """Return the faces of an image, (1, 3, H, W), in [0, 1], those of the highest confidence first."""
        check_batch("image", image, 3)
        self._network.setInputSize((image.shape[3], image.shape[2]))
        blue_green_red = np.ascontiguousarray(to_8bit(image[0])[..., ::-1])
        rows = self._network.detect(blue_green_red)[1]
        return [] if rows is None else [to_face(row) for row in sorted(rows, key=lambda row: -row[14])]


def to_face(row: np.ndarray) -> Face:
    """Read a row of YuNet's output, (15,): box, landmarks, score; the person's right eye is the photo's left eye."""
    left, top, width, height = (float(value) for value in row[:4])
    landmarks = torch.from_numpy(np.array(row[4:14], dtype=np.float64).reshape(5, 2))
    return Face((left, top, width, height), landmarks, float(row[14]))
