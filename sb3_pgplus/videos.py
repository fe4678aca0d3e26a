"""Writing frames to an mp4 file, one after the other."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from sb3_pgplus.configs import ConfigError


class VideoWriter:
    """
    Streams frames to ffmpeg; a long episode never has to fit into memory.

    :param path: the file
    :param ffmpeg: the module ``imageio_ffmpeg``
    """

    def __init__(self, path: Path, ffmpeg: Any) -> None:
        self._path = path
        self._ffmpeg = ffmpeg
        self._stream: Any = None
        self._fps = 30.0

    def at_speed(self, metadata: Mapping[str, Any]) -> Callable[[Any], None]:
        """
        :param metadata: of the environment, which knows its frame rate
        :return: :meth:`write`
        """
        self._fps = float(metadata.get("render_fps") or self._fps)
        return self.write

    def write(self, frame: Any) -> None:
        """
        :param frame: ``[height, width, 3]``
        :raises ConfigError: if it is something else
        """
        if not isinstance(frame, np.ndarray) or frame.ndim != 3:
            raise ConfigError("no video can be made: the environment renders no RGB frames (render mode rgb_array)")
        if self._stream is None:
            height, width = frame.shape[:2]
            # H.264 wants even sizes; ffmpeg rescales an odd one by a pixel.
            size = (width, height)
            self._stream = self._ffmpeg.write_frames(str(self._path), size, fps=self._fps, macro_block_size=2)
            self._stream.send(None)
        self._stream.send(np.ascontiguousarray(frame[..., :3], dtype=np.uint8))

    def close(self) -> None:
        """Finish the file."""
        if self._stream is not None:
            self._stream.close()


@contextmanager
def video_writer(video: Path) -> Iterator[VideoWriter]:
    """
    Open an mp4 file, which appears once it is complete.

    :param video: the file
    :raises ConfigError: if the package is missing
    """
    try:
        ffmpeg = importlib.import_module("imageio_ffmpeg")
    except ImportError as error:
        raise ConfigError('videos need imageio-ffmpeg: run: pip install "sb3_pgplus[report]"') from error
    video.parent.mkdir(parents=True, exist_ok=True)
    unfinished = video.with_name(f".{video.stem}-{os.getpid()}.mp4")
    writer = VideoWriter(unfinished, ffmpeg)
    try:
        yield writer
        writer.close()
        os.replace(unfinished, video)
    finally:
        writer.close()
        unfinished.unlink(missing_ok=True)
