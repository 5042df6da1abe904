"""What a job left, handed out piece by piece: whole bytes or none."""

from __future__ import annotations

from esperd.errors import StoreFailed
from esperd.messages.jobs import Artifact, ArtifactChunk
from esperd.store.blobs import Blobs

CHUNK_BYTES = 4 * 1024 * 1024


def chunk(blobs: Blobs, job_id: str, artifact: Artifact, offset: int) -> ArtifactChunk:
    """Up to :data:`CHUNK_BYTES` of an artifact. The first piece is handed out once all bytes were verified. A later one has no
    hash of its own, and verifying the whole for each would read a file of n pieces n times; its reader verifies what it puts
    together.

    Args:
        blobs: where it lies.
        job_id: whose it is.
        artifact: which one.
        offset: of the piece, in bytes.

    Raises:
        StoreFailed: when the artifact is damaged (it is moved to quarantine) or gone, or the disk refuses.
    """
    if offset == 0 and not blobs.is_good(artifact.sha256):
        moved = [name for name in blobs.quarantined() if name.startswith(artifact.sha256)]
        found = f"damaged, and was moved to {blobs.directory / 'quarantine' / moved[-1]}" if moved else "not there any more"
        raise StoreFailed(
            f"{artifact.name} of job {job_id} is {found}; run it again, or restore a backup with `esperd db restore BACKUP`",
            id=job_id,
            name=artifact.name,
            sha256=artifact.sha256,
        )
    return ArtifactChunk(
        offset=offset, data=blobs.read_range(artifact.sha256, offset, CHUNK_BYTES), size_bytes=artifact.size_bytes
    )
