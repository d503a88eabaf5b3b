"""Class images from wherever the user has them: sources of (caption, url or picture), the downloader, the class folder."""
