export type Equal<A, B> = (<T>() => T extends A ? 1 : 2) extends <T>() => T extends B ? 1 : 2 ? true : false;
/** `type _ = Expect<Equal<A, B>>` fails to compile unless the types are the same. */
export type Expect<T extends true> = T;
