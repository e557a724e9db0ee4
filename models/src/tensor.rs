//! A tensor: element type, shape, and row-major data in an Arrow buffer. Callers build it from Arrow columns
//! or vectors, backends read it and make it. Invariant: the buffer holds exactly the product of the shape in
//! elements and is aligned for them, so that every typed view is a cast and never a copy.

use std::fmt;

use arrow::buffer::{Buffer, ScalarBuffer};
use arrow::datatypes::ArrowNativeType;

/// Element type of a tensor, in the words of the Open Inference Protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DataType {
    /// 32-bit float.
    Fp32,
    /// 64-bit float.
    Fp64,
    /// Signed 8-bit integer.
    Int8,
    /// Signed 16-bit integer.
    Int16,
    /// Signed 32-bit integer.
    Int32,
    /// Signed 64-bit integer.
    Int64,
    /// Unsigned 8-bit integer.
    Uint8,
    /// Unsigned 16-bit integer.
    Uint16,
    /// Unsigned 32-bit integer.
    Uint32,
    /// Unsigned 64-bit integer.
    Uint64,
    /// Truth value, one byte each: 0 or 1.
    Bool,
    /// Byte strings. A signature can name them; a [`Tensor`] cannot hold them yet.
    Bytes,
}

impl DataType {
    /// Every type, in declaration order.
    pub const ALL: [DataType; 12] = [
        DataType::Fp32,
        DataType::Fp64,
        DataType::Int8,
        DataType::Int16,
        DataType::Int32,
        DataType::Int64,
        DataType::Uint8,
        DataType::Uint16,
        DataType::Uint32,
        DataType::Uint64,
        DataType::Bool,
        DataType::Bytes,
    ];

    /// Bytes that one element takes; `None` for `BYTES`, whose elements vary.
    pub fn size(self) -> Option<usize> {
        match self {
            DataType::Int8 | DataType::Uint8 | DataType::Bool => Some(1),
            DataType::Int16 | DataType::Uint16 => Some(2),
            DataType::Fp32 | DataType::Int32 | DataType::Uint32 => Some(4),
            DataType::Fp64 | DataType::Int64 | DataType::Uint64 => Some(8),
            DataType::Bytes => None,
        }
    }

    /// The word of the Open Inference Protocol: `FP32`, `INT64`, `BOOL`, `BYTES`.
    pub fn name(self) -> &'static str {
        match self {
            DataType::Fp32 => "FP32",
            DataType::Fp64 => "FP64",
            DataType::Int8 => "INT8",
            DataType::Int16 => "INT16",
            DataType::Int32 => "INT32",
            DataType::Int64 => "INT64",
            DataType::Uint8 => "UINT8",
            DataType::Uint16 => "UINT16",
            DataType::Uint32 => "UINT32",
            DataType::Uint64 => "UINT64",
            DataType::Bool => "BOOL",
            DataType::Bytes => "BYTES",
        }
    }

    /// The type with this word of the Open Inference Protocol, if there is one.
    pub fn from_name(name: &str) -> Option<DataType> {
        DataType::ALL.into_iter().find(|data_type| data_type.name() == name)
    }
}

impl fmt::Display for DataType {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

/// A Rust number that is the element of a tensor type.
pub trait Element: ArrowNativeType {
    /// The tensor type with these elements.
    const DATA_TYPE: DataType;
}

macro_rules! element {
    ($($number:ty => $variant:ident),+ $(,)?) => {
        $(impl Element for $number {
            const DATA_TYPE: DataType = DataType::$variant;
        })+
    };
}

element! {
    f32 => Fp32, f64 => Fp64,
    i8 => Int8, i16 => Int16, i32 => Int32, i64 => Int64,
    u8 => Uint8, u16 => Uint16, u32 => Uint32, u64 => Uint64,
}

/// Why data is not a tensor of a shape.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TensorError {
    /// The data is not as long as the shape says.
    #[error("a tensor {data_type}{} takes {expected} bytes, {found} were given", bracketed(.shape))]
    Length {
        /// Element type asked for.
        data_type: DataType,
        /// Shape asked for.
        shape: Vec<usize>,
        /// Bytes that the shape takes.
        expected: usize,
        /// Bytes that were given.
        found: usize,
    },
    /// The product of the shape does not fit into memory addresses.
    #[error("the shape {} has more elements than memory has addresses", bracketed(.shape))]
    Overflow {
        /// Shape asked for.
        shape: Vec<usize>,
    },
    /// The element type has no fixed size.
    #[error("tensors of type {data_type} are not supported; use a numeric type or BOOL")]
    Unsupported {
        /// Element type asked for.
        data_type: DataType,
    },
    /// A truth value is neither 0 nor 1.
    #[error("a BOOL tensor holds 0 and 1, found {found} at element {index}")]
    NotBool {
        /// Element, counted in row-major order from 0.
        index: usize,
        /// Its byte.
        found: u8,
    },
}

/// `[2,3]`
pub(crate) fn bracketed<T: fmt::Display>(dims: &[T]) -> String {
    let dims: Vec<String> = dims.iter().map(T::to_string).collect();
    format!("[{}]", dims.join(","))
}

/// A dense tensor. Cloning shares the data.
#[derive(Clone, PartialEq)]
pub struct Tensor {
    data_type: DataType,
    shape: Vec<usize>,
    data: Buffer,
}

impl Tensor {
    /// A tensor over an Arrow buffer: row-major, native byte order, exactly as long as `shape` says. The
    /// buffer is shared, and copied only if it is not aligned for its elements.
    pub fn from_buffer(data_type: DataType, shape: Vec<usize>, data: Buffer) -> Result<Tensor, TensorError> {
        let size = data_type.size().ok_or(TensorError::Unsupported { data_type })?;
        let expected = shape.iter().try_fold(size, |bytes, &dim| bytes.checked_mul(dim));
        let Some(expected) = expected else {
            return Err(TensorError::Overflow { shape });
        };
        if data.len() != expected {
            return Err(TensorError::Length { data_type, shape, expected, found: data.len() });
        }
        if data_type == DataType::Bool
            && let Some(index) = data.iter().position(|&byte| byte > 1)
        {
            return Err(TensorError::NotBool { index, found: data[index] });
        }
        let data = if data.as_ptr().addr().is_multiple_of(size) { data } else { Buffer::from(data.as_slice()) };
        Ok(Tensor { data_type, shape, data })
    }

    /// A tensor that takes the vector over without a copy.
    pub fn from_vec<T: Element>(shape: Vec<usize>, values: Vec<T>) -> Result<Tensor, TensorError> {
        Tensor::from_buffer(T::DATA_TYPE, shape, Buffer::from_vec(values))
    }

    /// A tensor over the values of an Arrow array (`array.values().clone()`), without a copy.
    pub fn from_values<T: Element>(shape: Vec<usize>, values: ScalarBuffer<T>) -> Result<Tensor, TensorError> {
        Tensor::from_buffer(T::DATA_TYPE, shape, values.into_inner())
    }

    /// A `BOOL` tensor; the values are copied, since Arrow packs them in bits and tensors in bytes.
    pub fn from_bools(shape: Vec<usize>, values: impl IntoIterator<Item = bool>) -> Result<Tensor, TensorError> {
        let bytes: Vec<u8> = values.into_iter().map(u8::from).collect();
        Tensor::from_buffer(DataType::Bool, shape, Buffer::from_vec(bytes))
    }

    /// Element type.
    pub fn data_type(&self) -> DataType {
        self.data_type
    }

    /// Extent of each axis, outermost first; empty for a scalar.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether an axis has no extent.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes: row-major, native byte order.
    pub fn data(&self) -> &Buffer {
        &self.data
    }

    /// The bytes, given up to the caller (an Arrow array takes them without a copy).
    pub fn into_data(self) -> Buffer {
        self.data
    }

    /// The elements, if `T` is their type.
    pub fn as_slice<T: Element>(&self) -> Option<&[T]> {
        (T::DATA_TYPE == self.data_type).then(|| self.data.typed_data::<T>())
    }

    /// The elements of an `FP32` tensor.
    pub fn as_f32(&self) -> Option<&[f32]> {
        self.as_slice()
    }

    /// The elements of an `FP64` tensor.
    pub fn as_f64(&self) -> Option<&[f64]> {
        self.as_slice()
    }

    /// The elements of an `INT8` tensor.
    pub fn as_i8(&self) -> Option<&[i8]> {
        self.as_slice()
    }

    /// The elements of an `INT16` tensor.
    pub fn as_i16(&self) -> Option<&[i16]> {
        self.as_slice()
    }

    /// The elements of an `INT32` tensor.
    pub fn as_i32(&self) -> Option<&[i32]> {
        self.as_slice()
    }

    /// The elements of an `INT64` tensor.
    pub fn as_i64(&self) -> Option<&[i64]> {
        self.as_slice()
    }

    /// The elements of a `UINT8` tensor.
    pub fn as_u8(&self) -> Option<&[u8]> {
        self.as_slice()
    }

    /// The elements of a `UINT16` tensor.
    pub fn as_u16(&self) -> Option<&[u16]> {
        self.as_slice()
    }

    /// The elements of a `UINT32` tensor.
    pub fn as_u32(&self) -> Option<&[u32]> {
        self.as_slice()
    }

    /// The elements of a `UINT64` tensor.
    pub fn as_u64(&self) -> Option<&[u64]> {
        self.as_slice()
    }

    /// The elements of a `BOOL` tensor.
    pub fn bools(&self) -> Option<impl ExactSizeIterator<Item = bool> + '_> {
        (self.data_type == DataType::Bool).then(|| self.data.iter().map(|&byte| byte != 0))
    }
}

/// `FP32[2,3]`
impl fmt::Display for Tensor {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}{}", self.data_type, bracketed(&self.shape))
    }
}

/// As [`Display`](fmt::Display): the data may be megabytes and has no place in a log line.
impl fmt::Debug for Tensor {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_read_back() {
        for data_type in DataType::ALL {
            assert_eq!(DataType::from_name(data_type.name()), Some(data_type));
        }
        assert_eq!(DataType::from_name("FP16"), None);
    }

    #[test]
    fn a_vector_is_taken_over_and_read_in_its_own_type_only() {
        let values = vec![1.0_f32, 2.0, 3.0, 4.0, 5.0, 6.0];
        let address = values.as_ptr().addr();
        let tensor = Tensor::from_vec(vec![2, 3], values).unwrap();
        assert_eq!(tensor.data().as_ptr().addr(), address);
        assert_eq!(tensor.as_f32(), Some(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0][..]));
        assert_eq!(tensor.as_f64(), None);
        assert_eq!(tensor.as_u8(), None);
        assert_eq!(tensor.len(), 6);
        assert_eq!(tensor.to_string(), "FP32[2,3]");
    }

    #[test]
    fn arrow_values_are_shared() {
        let values = ScalarBuffer::from(vec![7_i64, 8, 9]);
        let tensor = Tensor::from_values(vec![2, 1], values.slice(1, 2)).unwrap();
        assert_eq!(tensor.as_i64(), Some(&[8, 9][..]));
        assert_eq!(tensor.data().as_ptr().addr(), values.inner().as_ptr().addr() + 8);
    }

    #[test]
    fn misaligned_bytes_are_copied_and_right() {
        let mut bytes = vec![0xff_u8];
        bytes.extend([1.5_f32, -2.5].iter().flat_map(|value| value.to_ne_bytes()));
        let buffer = Buffer::from(bytes.as_slice()).slice(1);
        let tensor = Tensor::from_buffer(DataType::Fp32, vec![2], buffer).unwrap();
        assert_eq!(tensor.as_f32(), Some(&[1.5, -2.5][..]));
    }

    #[test]
    fn a_scalar_has_one_element_and_an_empty_axis_none() {
        let scalar = Tensor::from_vec(vec![], vec![3_i32]).unwrap();
        assert_eq!((scalar.len(), scalar.as_i32()), (1, Some(&[3][..])));
        let empty = Tensor::from_vec::<f64>(vec![0, 9], vec![]).unwrap();
        assert!(empty.is_empty());
        assert_eq!(empty.as_f64(), Some(&[] as &[f64]));
    }

    #[test]
    fn truth_values_take_a_byte_each() {
        let tensor = Tensor::from_bools(vec![3], [true, false, true]).unwrap();
        assert_eq!(tensor.data().as_slice(), [1, 0, 1]);
        assert_eq!(tensor.bools().unwrap().collect::<Vec<_>>(), [true, false, true]);
        let error = Tensor::from_buffer(DataType::Bool, vec![2], Buffer::from(&[1_u8, 2][..])).unwrap_err();
        assert_eq!(error.to_string(), "a BOOL tensor holds 0 and 1, found 2 at element 1");
    }

    #[test]
    fn wrong_lengths_and_types_are_refused() {
        let error = Tensor::from_vec(vec![2, 3], vec![1.0_f32; 5]).unwrap_err();
        assert_eq!(error.to_string(), "a tensor FP32[2,3] takes 24 bytes, 20 were given");
        let error = Tensor::from_vec(vec![usize::MAX, 2], vec![1.0_f32]).unwrap_err();
        assert!(matches!(error, TensorError::Overflow { .. }));
        let error = Tensor::from_buffer(DataType::Bytes, vec![1], Buffer::from(&b"x"[..])).unwrap_err();
        assert_eq!(error, TensorError::Unsupported { data_type: DataType::Bytes });
    }
}
