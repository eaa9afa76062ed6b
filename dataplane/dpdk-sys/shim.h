/* DPDK's inline functions and macros as functions with a symbol. No logic here. */
#ifndef DPDK_SYS_SHIM_H
#define DPDK_SYS_SHIM_H

#include <stdint.h>

struct rte_mbuf;
struct rte_mempool;

/* rte_errno of the calling thread. */
int shim_errno(void);

/* rte_eth_rx_burst and rte_eth_tx_burst. */
uint16_t shim_rx_burst(uint16_t port, uint16_t queue, struct rte_mbuf **mbufs, uint16_t count);
uint16_t shim_tx_burst(uint16_t port, uint16_t queue, struct rte_mbuf **mbufs, uint16_t count);

/* rte_pktmbuf_alloc, rte_pktmbuf_append and rte_pktmbuf_free. */
struct rte_mbuf *shim_mbuf_alloc(struct rte_mempool *pool);
char *shim_mbuf_append(struct rte_mbuf *mbuf, uint16_t len);
void shim_mbuf_free(struct rte_mbuf *mbuf);

/* rte_pktmbuf_mtod, rte_pktmbuf_data_len, and the two facts about a received frame. */
const char *shim_mbuf_data(const struct rte_mbuf *mbuf);
uint16_t shim_mbuf_data_len(const struct rte_mbuf *mbuf);
uint32_t shim_mbuf_pkt_len(const struct rte_mbuf *mbuf);
uint64_t shim_mbuf_flags(const struct rte_mbuf *mbuf);

/* Macros that bindgen cannot evaluate. */
extern const uint64_t SHIM_RX_VLAN_STRIPPED;
extern const uint16_t SHIM_MBUF_HEADROOM;

#endif
