// AdamW's arithmetic for one element, the roundings, and the 8-bit moments: one text for the host and the device. Every
// operation is correctly rounded (no contraction, no fast maths), so both give the same bits.
#pragma once

#include "mask.h"
#include "status.h"

#include <cmath>
#include <initializer_list>

namespace lorapar {

LORAPAR_BOTH bool is_finite(float value) { return magnitude(value) < 0x7f800000u; }

// ---- 16-bit floats ----

LORAPAR_BOTH float from_bfloat16(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

// To nearest, ties to even; a NaN stays one.
LORAPAR_BOTH uint16_t to_bfloat16(float value) {
    const uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Up where the 16 bits that are cut off and 16 random ones together carry: on average the value itself.
LORAPAR_BOTH uint16_t to_bfloat16_at_random(float value, uint32_t random) {
    const uint32_t bits = bits_of(value);
    return is_finite(value) ? static_cast<uint16_t>((bits + (random & 0xffff)) >> 16) : to_bfloat16(value);
}

LORAPAR_BOTH float from_float16(uint16_t bits) {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, magnitude = bits & 0x7fff;
    // Infinity and NaN, normal numbers, and subnormal ones as integers times 2^-24.
    if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000u | magnitude << 13);
    if (magnitude >= 0x0400) return float_of(sign | ((magnitude << 13) + (112u << 23)));
    return float_of(sign | bits_of(static_cast<float>(magnitude) * 5.9604644775390625e-8f));
}

// To nearest, ties to even; a NaN stays one.
LORAPAR_BOTH uint16_t to_float16(float value) {
    const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00 | (magnitude >> 13 & 0x3ff));
    // From 65520 on the nearest is infinity.
    if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00);
    if (magnitude >= 0x38800000u) {
        return static_cast<uint16_t>(sign | ((magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13));
    }
    // Below 2^-14 float16 counts in units of 2^-24; adding 1/2 makes float32 do so too, and round.
    return static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u));
}

// `type` is LORAPAR_BFLOAT16 or LORAPAR_FLOAT16.
LORAPAR_BOTH float from_half(uint16_t bits, int type) {
    return type == LORAPAR_BFLOAT16 ? from_bfloat16(bits) : from_float16(bits);
}
LORAPAR_BOTH uint16_t to_half(float value, int type) {
    return type == LORAPAR_BFLOAT16 ? to_bfloat16(value) : to_float16(value);
}

// ---- random bits: a hash of (seed, step, tensor, element), so that they are the same on every device ----

// Steele, Lea & Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
LORAPAR_BOTH uint64_t splitmix64(uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

// A bijection of 32 bits found by search for little bias (C. Wellons' lowbias32).
LORAPAR_BOTH uint32_t mixed(uint32_t x) {
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
}

// Of one tensor in one step.
LORAPAR_BOTH uint64_t key_of(uint64_t seed, int64_t step, int64_t tensor) {
    return splitmix64(splitmix64(seed + static_cast<uint64_t>(step)) + static_cast<uint64_t>(tensor));
}
// Stream 0 rounds the parameter, stream 1 both moments, with 16 bits each.
LORAPAR_BOTH uint32_t random_bits(uint64_t key, int64_t element, uint32_t stream) {
    const uint32_t low = static_cast<uint32_t>(element), high = static_cast<uint32_t>(element >> 32);
    const uint32_t first = mixed(low ^ static_cast<uint32_t>(key));
    return mixed(first ^ static_cast<uint32_t>(key >> 32) ^ mixed(2 * high + stream));
}

// ---- the step ----

// A step's constants, each rounded once to float.
struct Coefficients {
    float decay, weight_1, keep_1, keep_2, weight_2, root_factor, eps, rate, grad_sign;
};

// What a step is of: its number and its rate, from the settings or from the memory that they name.
struct Step {
    int64_t number;
    double lr;
};

LORAPAR_BOTH Step step_of(const lorapar_adamw_settings &s) {
    Step step{s.step, s.lr_at == nullptr ? s.lr : static_cast<double>(*s.lr_at)};
    if (s.step_at != nullptr && s.step_type == 0) step.number = *static_cast<const int64_t *>(s.step_at);
    if (s.step_at != nullptr && s.step_type == 1) {
        const float number = *static_cast<const float *>(s.step_at);
        step.number = number >= 1.0f && number < 9e18f ? static_cast<int64_t>(number) : 0;
    }
    return step;
}

// Whether there is such a step.
LORAPAR_BOTH bool valid(const Step &step) { return step.number >= 1 && step.lr >= 0.0 && step.lr - step.lr == 0.0; }

// base to the exponent-th, 0 <= base < 1, exponent >= 1: by squaring, within two roundings a bit of the exponent. A
// device's own power of doubles is as close, and twenty times the code.
LORAPAR_BOTH double power_of(double base, int64_t exponent) {
    double power = 1.0;
    for (; exponent > 0; exponent /= 2, base *= base) {
        if (exponent % 2 != 0) power *= base;
    }
    return power;
}

// `power_1` and `power_2`: the betas to the step-th.
LORAPAR_BOTH Coefficients coefficients_of(const lorapar_adamw_settings &s, double lr, double power_1, double power_2) {
    return {static_cast<float>(1.0 - lr * s.weight_decay),
            static_cast<float>(1.0 - s.beta1),
            static_cast<float>(1.0 - static_cast<float>(1.0 - s.beta1)),
            static_cast<float>(s.beta2),
            static_cast<float>(1.0 - s.beta2),
            static_cast<float>(1.0 / sqrt(1.0 - power_2)),
            static_cast<float>(s.eps),
            static_cast<float>(-lr / (1.0 - power_1)),
            s.maximize ? -1.0f : 1.0f};
}

// On the host.
inline Coefficients coefficients_of(const lorapar_adamw_settings &s, const Step &step) {
    const double number = static_cast<double>(step.number);
    return coefficients_of(s, step.lr, std::pow(s.beta1, number), std::pow(s.beta2, number));
}

// gradient: scaled and signed.
LORAPAR_BOTH void adamw(const Coefficients &c, float gradient, float &param, float &exp_avg, float &exp_avg_sq) {
    // torch.lerp's two forms, so that a weight of 1 gives the gradient itself.
    const float difference = gradient - exp_avg;
    exp_avg = c.weight_1 < 0.5f ? exp_avg + c.weight_1 * difference : gradient - difference * c.keep_1;
    exp_avg_sq = exp_avg_sq * c.keep_2 + (c.weight_2 * gradient) * gradient;
    const float root = sqrtf(exp_avg_sq) * c.root_factor + c.eps;
    param = param * c.decay + c.rate * (exp_avg / root);
}

// ---- 8-bit moments: a code c stands for ±(c / 127)² and (c / 255)⁴ of the tile's largest ----
//
// Powers, because moments span many orders within a tile: the least exp_avg is 6e-5 of the largest, as is the least root
// of an exp_avg_sq. Codes are rounded at random without bias: an average that moves by a thousandth a step would never
// move among codes that are a hundredth apart. An exp_avg_sq above 0 has a code of 2 at least, a root no smaller than the
// least exp_avg, so that no step explodes. Only products, quotients and roots: the same bits everywhere.

LORAPAR_BOTH float from_code_1(int8_t code, float largest) {
    const float c = static_cast<float>(code);
    return c * fabsf(c) * (largest / 16129.0f);
}
LORAPAR_BOTH float from_code_2(uint8_t code, float largest) {
    const float square = static_cast<float>(code) * static_cast<float>(code);
    return square * square * (largest / 4228250625.0f);
}

// largest > 0 and finite, random of 16 bits.
LORAPAR_BOTH int8_t to_code_1(float value, float largest, uint32_t random) {
    const float target = fabsf(value) / largest * 16129.0f;
    const float low = floorf(sqrtf(target));
    const float share = (target - low * low) / (2.0f * low + 1.0f);
    const int code = static_cast<int>(low) + (static_cast<float>(random) < share * 65536.0f);
    const int most = code < 127 ? code : 127;
    return static_cast<int8_t>(value < 0.0f ? -most : most);
}
LORAPAR_BOTH uint8_t to_code_2(float value, float largest, uint32_t random) {
    const float target = value / largest * 4228250625.0f;
    const float low = floorf(sqrtf(sqrtf(target)));
    const float low_2 = low * low, high_2 = (low + 1.0f) * (low + 1.0f);
    const float share = (target - low_2 * low_2) / (high_2 * high_2 - low_2 * low_2);
    const int code = static_cast<int>(low) + (static_cast<float>(random) < share * 65536.0f);
    const int least = value > 0.0f ? 2 : 0;
    return static_cast<uint8_t>(code < least ? least : code < 255 ? code : 255);
}

// A tile whose largest is 0 decodes to 0 whatever the codes, and one that holds an infinity or NaN to no number at all:
// both get codes of 1, and no arithmetic.
LORAPAR_BOTH bool encodable(float largest) { return largest > 0.0f && is_finite(largest); }

// ---- what can be wrong ----

// Whether the moments of a list are codes; a tensor without elements has none of either.
inline bool has_codes(const lorapar_adamw_tensor *tensors, int64_t count) {
    for (int64_t t = 0; t < count; ++t) {
        if (tensors[t].n > 0) return tensors[t].scales != nullptr;
    }
    return false;
}

inline int check_adamw(const lorapar_adamw_tensor *tensors, int64_t count, const lorapar_adamw_settings *settings) {
    if (int status = check(count, tensors)) return status;
    if (int status = check_pointer(settings, 1)) return status;
    const lorapar_adamw_settings &s = *settings;
    const bool fine = s.step >= 1 && s.lr >= 0.0 && std::isfinite(s.lr) && s.beta1 >= 0.0 && s.beta1 < 1.0 &&
                      s.beta2 >= 0.0 && s.beta2 < 1.0 && s.eps >= 0.0 && std::isfinite(s.eps) &&
                      s.weight_decay >= 0.0 && std::isfinite(s.weight_decay) && s.param_type >= 0 &&
                      s.param_type <= LORAPAR_FLOAT16 && s.grad_type >= 0 && s.grad_type <= LORAPAR_FLOAT16 &&
                      (!s.stochastic || s.param_type == LORAPAR_BFLOAT16) && (s.step_type == 0 || s.step_type == 1);
    if (!fine) return LORAPAR_ERROR_SETTING;
    const int64_t optional = 1;
    if (s.grad_scale != nullptr && check_pointer(s.grad_scale, optional)) return LORAPAR_ERROR_ALIGNMENT;
    if (s.skipped != nullptr && check_pointer(s.skipped, optional)) return LORAPAR_ERROR_ALIGNMENT;
    const int step_status = s.step_type == 0 ? check_pointer(static_cast<const int64_t *>(s.step_at), optional)
                                             : check_pointer(static_cast<const float *>(s.step_at), optional);
    if (s.step_at != nullptr && step_status) return LORAPAR_ERROR_ALIGNMENT;
    if (s.lr_at != nullptr && check_pointer(s.lr_at, optional)) return LORAPAR_ERROR_ALIGNMENT;
    auto check_typed = [](const void *pointer, int type, int64_t n) {
        return type == LORAPAR_FLOAT32 ? check_pointer(static_cast<const float *>(pointer), n)
                                       : check_pointer(static_cast<const uint16_t *>(pointer), n);
    };
    const bool codes = has_codes(tensors, count);
    for (int64_t t = 0; t < count; ++t) {
        const lorapar_adamw_tensor &tensor = tensors[t];
        if (tensor.n == 0 && tensor.active == 0) continue;
        if (tensor.active < 0 || tensor.active > tensor.n) return LORAPAR_ERROR_SIZE;
        if (int status = check(tensor.n, tensor.mask, tensor.before)) return status;
        if (int status = check_typed(tensor.param, s.param_type, tensor.n)) return status;
        if (int status = check_typed(tensor.grad, s.grad_type, tensor.n)) return status;
        if (codes != (tensor.scales != nullptr)) return LORAPAR_ERROR_SETTING;
        for (const void *moment : {tensor.exp_avg, tensor.exp_avg_sq}) {
            if (tensor.active > 0 && moment == nullptr) return LORAPAR_ERROR_NULL_POINTER;
            if (!codes && check_pointer(static_cast<const float *>(moment), tensor.active)) return LORAPAR_ERROR_ALIGNMENT;
        }
        if (codes && check_pointer(tensor.scales, tensor.n)) return LORAPAR_ERROR_ALIGNMENT;
        if (tensor.compensation == nullptr) continue;
        if (s.stochastic || s.param_type == LORAPAR_FLOAT32) return LORAPAR_ERROR_SETTING;
        if (int status = check_typed(tensor.compensation, s.param_type, tensor.active)) return status;
    }
    return LORAPAR_OK;
}

}  // namespace lorapar
