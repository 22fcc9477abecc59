from helpers.published import *  # noqa: F403  # for test modules that still ask here
