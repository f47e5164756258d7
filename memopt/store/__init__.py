"""Named bytes on the SSD: direct files, staging memory, transfers and the block store."""
