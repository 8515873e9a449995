"""A mypy plugin: the parts of a model that are reached by name (`model.blocks`, `block.attn`) are Any, where torch says `Tensor | Module` of every one."""
from mypy.plugin import AttributeContext, Plugin
from mypy.types import AnyType, Type, TypeOfAny


def _any(context: AttributeContext) -> Type: return AnyType(TypeOfAny.explicit)


class Parts(Plugin):
    def get_attribute_hook(self, fullname: str): return _any if fullname.startswith("torch.nn.modules.module.Module.") else None


def plugin(version: str) -> type[Plugin]: return Parts
