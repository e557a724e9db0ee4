//! Which Arrow values are which tensor elements. Binding asks whether a column may become an input; gathering and the
//! outputs go from a tensor type to the Arrow type with the same bytes. Invariant: no cast that is allowed here can
//! fail on a value.

use afferent_models::DataType as TensorType;
use arrow::datatypes::DataType;

/// Runs `$body` with `$number` standing for the Arrow type of numbers with the elements of `$tensor`; `$other` for
/// what is no number.
macro_rules! with_number {
    ($tensor:expr, $number:ident => $body:expr, $other:expr) => {
        match $tensor {
            ::afferent_models::DataType::Fp32 => {
                type $number = ::arrow::datatypes::Float32Type;
                $body
            }
            ::afferent_models::DataType::Fp64 => {
                type $number = ::arrow::datatypes::Float64Type;
                $body
            }
            ::afferent_models::DataType::Int8 => {
                type $number = ::arrow::datatypes::Int8Type;
                $body
            }
            ::afferent_models::DataType::Int16 => {
                type $number = ::arrow::datatypes::Int16Type;
                $body
            }
            ::afferent_models::DataType::Int32 => {
                type $number = ::arrow::datatypes::Int32Type;
                $body
            }
            ::afferent_models::DataType::Int64 => {
                type $number = ::arrow::datatypes::Int64Type;
                $body
            }
            ::afferent_models::DataType::Uint8 => {
                type $number = ::arrow::datatypes::UInt8Type;
                $body
            }
            ::afferent_models::DataType::Uint16 => {
                type $number = ::arrow::datatypes::UInt16Type;
                $body
            }
            ::afferent_models::DataType::Uint32 => {
                type $number = ::arrow::datatypes::UInt32Type;
                $body
            }
            ::afferent_models::DataType::Uint64 => {
                type $number = ::arrow::datatypes::UInt64Type;
                $body
            }
            ::afferent_models::DataType::Bool | ::afferent_models::DataType::Bytes => $other,
        }
    };
}
pub(super) use with_number;

/// The Arrow type of single values of a tensor; none for byte strings, which tensors cannot hold.
pub(super) fn arrow_type(tensor: TensorType) -> Option<DataType> {
    Some(match tensor {
        TensorType::Fp32 => DataType::Float32,
        TensorType::Fp64 => DataType::Float64,
        TensorType::Int8 => DataType::Int8,
        TensorType::Int16 => DataType::Int16,
        TensorType::Int32 => DataType::Int32,
        TensorType::Int64 => DataType::Int64,
        TensorType::Uint8 => DataType::UInt8,
        TensorType::Uint16 => DataType::UInt16,
        TensorType::Uint32 => DataType::UInt32,
        TensorType::Uint64 => DataType::UInt64,
        TensorType::Bool => DataType::Boolean,
        TensorType::Bytes => return None,
    })
}

/// Whether values of an Arrow type become elements of a tensor: the same type, any number for a float (which may cost
/// precision), and a narrower integer for a wider one.
pub(super) fn converts(from: &DataType, to: TensorType) -> bool {
    let Some(to) = arrow_type(to) else { return false };
    if *from == to {
        return true;
    }
    if to.is_floating() {
        return from.is_integer() || from.is_floating();
    }
    let narrower = from.primitive_width() < to.primitive_width();
    narrower && (from.is_unsigned_integer() && to.is_integer() || from.is_signed_integer() && to.is_signed_integer())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_casts_that_cannot_fail_are_allowed() {
        for (from, to) in [
            (DataType::Int64, TensorType::Fp32),
            (DataType::Float64, TensorType::Fp32),
            (DataType::Float16, TensorType::Fp64),
            (DataType::UInt8, TensorType::Int16),
            (DataType::UInt8, TensorType::Uint64),
            (DataType::Int8, TensorType::Int64),
            (DataType::Boolean, TensorType::Bool),
        ] {
            assert!(converts(&from, to), "{from} to {to}");
        }
        for (from, to) in [
            (DataType::Utf8, TensorType::Fp32),
            (DataType::Utf8, TensorType::Bytes),
            (DataType::Float32, TensorType::Int64),
            (DataType::Int64, TensorType::Int32),
            (DataType::UInt8, TensorType::Int8),
            (DataType::Int8, TensorType::Uint64),
            (DataType::Boolean, TensorType::Fp32),
            (DataType::Date32, TensorType::Int64),
        ] {
            assert!(!converts(&from, to), "{from} to {to}");
        }
    }
}
