"""The page of `milo-latent app`; needs the extra `app`."""
