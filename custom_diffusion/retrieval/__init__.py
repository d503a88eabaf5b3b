"""Class images from wherever the user has them: sources of (caption, url or image), the downloader, the class folder."""
