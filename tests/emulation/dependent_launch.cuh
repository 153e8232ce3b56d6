#pragma once
#include "elements.cuh"

DEVICE void launch_dependents() {}
DEVICE void wait_for_previous() {}
