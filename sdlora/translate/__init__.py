"""Configs of other trainers, translated to settings of this one."""
