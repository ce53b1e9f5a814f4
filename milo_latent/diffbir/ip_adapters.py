"""Diffusers' IP-adapters for a pipeline, imported at their first use."""

from __future__ import annotations

from typing import Any


class IPAdaptersMixin:
    """The methods of diffusers' `IPAdapterMixin`, whose import would double the time of every start, and print."""

    def load_ip_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Load an adapter's weights into the UNet, as `IPAdapterMixin.load_ip_adapter` does."""
        _mixin().load_ip_adapter(self, *args, **kwargs)

    def set_ip_adapter_scale(self, scale: Any) -> None:
        """Set the strength of each adapter, as `IPAdapterMixin.set_ip_adapter_scale` does."""
        _mixin().set_ip_adapter_scale(self, scale)

    def unload_ip_adapter(self) -> None:
        """Remove all adapters from the UNet."""
        _mixin().unload_ip_adapter(self)


def _mixin() -> Any:
    from diffusers.loaders import IPAdapterMixin

    return IPAdapterMixin
