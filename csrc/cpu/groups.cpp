// The statistics that a norm uses, out of those of every (image, channel); see sf_compile/ops/norm_statistics.py.
#include <algorithm>
#include <cmath>
#include <cstdint>

struct Groups {
  const float *mean, *variance;      // (images * groups, channels of a group)
  float *mean_out, *variance_out;    // alike: a group's for each of its channels
  int64_t groups, channels;          // groups of all images
  int64_t has_outer_eps;
  double bessel, outer_eps, constant_root;
};

extern "C" int64_t styleforge_groups_size() { return sizeof(Groups); }

// Merged in double precision by M = E[m], V = E[v + (m - M)^2]: without a difference of squares.
extern "C" void styleforge_groups(const Groups* a) {
  for (int64_t group = 0; group < a->groups; group++) {
    const int64_t first = group * a->channels;
    const float *means = a->mean + first, *variances = a->variance + first;
    double mean = 0, variance = 0;
    for (int64_t c = 0; c < a->channels; c++) mean += means[c];
    mean /= a->channels;
    for (int64_t c = 0; c < a->channels; c++) variance += variances[c] + (means[c] - mean) * (means[c] - mean);
    variance = variance / a->channels * a->bessel;
    if (a->has_outer_eps) {
      double root = std::sqrt(variance) + a->outer_eps;
      if (a->outer_eps > 0 && variance == 0) root = std::max(root, std::abs(mean) * a->constant_root);
      variance = root * root;
    }
    std::fill_n(a->mean_out + first, a->channels, static_cast<float>(mean));
    std::fill_n(a->variance_out + first, a->channels, static_cast<float>(variance));
  }
}
